"""Open descriptors of a process tree: surveyed while it runs, saved while it is stopped, made again.

What is carried and what is refused is listed in docs/descriptors.md.
"""

from migrator.engine.user.descriptors.collection import begin, make_room
from migrator.engine.user.descriptors.description import Holder
from migrator.engine.user.descriptors.dump import DescriptorDump, Memfd
from migrator.engine.user.descriptors.found import MessageQueue
from migrator.engine.user.descriptors.predumped import PredumpedFiles
from migrator.engine.user.descriptors.private_root import finish_moves
from migrator.engine.user.descriptors.restore import OF_DESCRIPTORS, Context, DescriptorRestore
from migrator.engine.user.descriptors.standing import Standing
from migrator.engine.user.descriptors.survey import survey
from migrator.engine.user.descriptors.survey_notes import notes
from migrator.engine.user.descriptors.transients import Transients

__all__ = [
    "OF_DESCRIPTORS",
    "Context",
    "DescriptorDump",
    "DescriptorRestore",
    "Holder",
    "Memfd",
    "MessageQueue",
    "PredumpedFiles",
    "Standing",
    "Transients",
    "begin",
    "finish_moves",
    "make_room",
    "notes",
    "survey",
]
