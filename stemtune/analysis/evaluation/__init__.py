"""How good a map or a set of labels is, beside a ground truth or without one."""
