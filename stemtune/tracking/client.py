"""Whether a tracking server takes what we are going to send, asked before the first trial begins."""

from __future__ import annotations

from typing import Any

from stemtune.errors import UserError
from stemtune.tracking.address import Address, client
from stemtune.tracking.events import KIND_OF_EXPERIMENT

_PASSWORD = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials (mode 600)"


def greet(where: Address, name: str) -> None:
    """See that the server at `where` lets us write the experiment `name`.

    An absent server is no obstacle, for records wait for it in the sweep's folder; one that refuses us would have
    them wait for ever.

    Raises
    ------
    UserError
        When name and password are missing or wrong, or the experiment is another user's.
    """
    if not where.is_server:
        return
    api = client(where)
    try:
        found = api.get_experiment_by_name(name)
    except Exception as problem:
        if _code(problem) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(
                f"the MLflow server {where.shown} refuses us: name or password is missing or wrong; set {_PASSWORD}"
            ) from None
        return
    if found is None or found.lifecycle_stage == "deleted":
        return
    try:  # what every sweep writes there: whether we may is only told by trying
        for key, value in KIND_OF_EXPERIMENT.items():
            api.set_experiment_tag(found.experiment_id, key, value)
    except Exception as problem:
        if _code(problem) == "PERMISSION_DENIED":
            raise UserError(
                f"the experiment '{name}' at {where.shown} is another user's; choose another --name, or have its"
                " owner give you the right to edit it"
            ) from None


def _code(problem: Exception) -> Any:
    return getattr(problem, "error_code", "")
