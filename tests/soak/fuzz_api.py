"""Requests made out of /openapi.json by schemathesis, valid and nearly valid ones. None may be a 5xx.

    python tests/soak/fuzz_api.py [--examples 60] [--seconds 300] [--seed N]

Everything that a served route describes is tried, on a real server with the tiny model. A server that is not
there any more afterwards, or one that logged an error, is a failure too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Checks, options, server_of, tiny_model, work_folder


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--examples", type=int, default=60, help="per operation")
    parser.add_argument("--seconds", type=int, default=300)
    args = parser.parse_args()
    checks = Checks()
    with (
        work_folder(args.keep) as folder,
        server_of(tiny_model(folder), folder / "state", "--threads", "1") as server,
    ):
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json"]
        command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--continue-on-failure"]
        command += ["--max-examples", str(args.examples), "--max-time", str(args.seconds)]
        command += ["--seed", str(args.seed), "--suppress-health-check", "all", "--request-timeout", "30"]
        command += ["--workers", "2", "--no-color", "--warnings", "off", "--max-failures", "20"]
        run = subprocess.run(command, cwd=folder, timeout=2 * args.seconds + 120, check=False)
        checks.that(run.returncode == 0, "no request is answered with a 5xx", f"exit code {run.returncode}")
        found = server.scrape()
        checks.that(found["hayai_engine_up"] == 1, "the engine still runs")
        answered = sum(v for k, v in found.items() if k.startswith("hayai_requests_total"))
        refused = sum(v for k, v in found.items() if k.startswith("hayai_rejected_total"))
        checks.that(answered > 0 and refused > 0, "some requests run and some are refused", answered, refused)
        code, log = server.stop()
        checks.that(
            code == 0 and "rror" not in log, "SIGTERM ends the server cleanly", code, log.strip()[-500:]
        )
    return checks.code()


if __name__ == "__main__":
    sys.exit(main())
