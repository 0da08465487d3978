"""The durable record of a migration, and what an agent does with an unfinished one."""
