"""What two hosts say to each other: messages and state tables. No I/O."""
