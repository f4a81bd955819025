"""Commands of `scol` in a process of their own: `s3_drive.py JSON`, a list of argument lists; prints what came out."""

import json
import sys

from click.testing import CliRunner

from cluster import ray_session
from pipelines.cli.main import main
from tests.helpers.warm_workers import warm

if __name__ == "__main__":
    found = []
    with warm(), ray_session(num_cpus=2):  # one for all commands
        for arguments in json.loads(sys.argv[1]):
            result = CliRunner().invoke(main, arguments)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            found.append({"status": result.exit_code, "out": result.stdout, "err": result.stderr})
    print(json.dumps(found))
