"""The image: records, their codec, their order. Pure: no I/O, no other part of the project but errors.

Importing this package registers every record.
"""

from migrator.image import records as records
from migrator.image import records_files as records_files
from migrator.image import records_shared as records_shared
