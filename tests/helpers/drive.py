"""A driver in a process of its own: `drive.py STORE LOG ITEMS MODE [ADDRESS]`."""

import json
import signal
import sys

from cluster import Engine, PartStore, RunInterrupted
from tests.helpers.arithmetic import VERSIONS, chain, source_table, stages

if __name__ == "__main__":
    # Where the tests run in the background, SIGINT is ignored, which processes inherit; a terminal's is not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    url, log, count, mode, *address = sys.argv[1:]
    source = source_table([mode] * int(count))
    engine = Engine(PartStore(url), stages(log), shard_items=2, address=address[0] if address else None)
    try:
        summary = engine.run(source, chain(source, VERSIONS))
    except RunInterrupted as stop:
        print(json.dumps(stop.summary.to_dict()))
        sys.exit(130)
    print(json.dumps(summary.to_dict()))
