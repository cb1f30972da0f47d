"""`hayai` as a process: the command, and the type of the fixture that runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

COMMAND = (sys.executable, "-W", "error", "-m", "hayai.cli.main")
Hayai = Callable[..., "subprocess.CompletedProcess[str]"]
