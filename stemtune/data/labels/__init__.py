"""Labels of measured patterns: what a labeller says, how a map is laid on a store, and how labels are kept in it."""

from stemtune.data.labels.label_map import LabelMap, laid_on
from stemtune.data.labels.writing import LABELLED, Labels, label_target, write_labels

__all__ = ["LABELLED", "LabelMap", "Labels", "label_target", "laid_on", "write_labels"]
