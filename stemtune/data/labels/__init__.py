"""Labels of measured patterns: what a labeller says, how a map made elsewhere is read and laid on a store, and how
labels are kept in it."""

from stemtune.data.labels.foreign import ForeignMap, ForeignPhase
from stemtune.data.labels.label_map import LabelMap, laid_on
from stemtune.data.labels.reading import read_map
from stemtune.data.labels.writing import LABELLED, Labels, label_target, with_truth, write_labels

__all__ = [
    "LABELLED",
    "ForeignMap",
    "ForeignPhase",
    "LabelMap",
    "Labels",
    "label_target",
    "laid_on",
    "read_map",
    "with_truth",
    "write_labels",
]
