"""Makes a user of the MLflow server, or gives one a new password: `python cluster/mlflow/add_user.py NAME`.

The server's address is MLFLOW_TRACKING_URI, and the administrator's name and password are those of
MLFLOW_TRACKING_USERNAME and _PASSWORD or of ~/.mlflow/credentials. The user's password is asked for, or read from
standard input where that is no terminal; it stands on no command line.
"""

from __future__ import annotations

import getpass
import os
import sys


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    where = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not where.startswith(("http://", "https://")):
        print("stemtune: set MLFLOW_TRACKING_URI to the server's address, http://HOST:PORT", file=sys.stderr)
        return 2
    name = sys.argv[1]
    password = getpass.getpass(f"password of {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    users = get_app_client("basic-auth", tracking_uri=where)
    try:
        try:
            users.create_user(name, password)
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            users.update_user_password(name, password)
    except MlflowException as problem:
        print(f"stemtune: {where} did not take the user {name}: {str(problem).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{name} can use {where} now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
