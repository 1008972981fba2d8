"""Checks run in a process of their own, where something has to be chosen before it is imported.

The script that holds the checks is run with them as JSON: it calls `report`, and prints what each found.
"""

import json
import os
import subprocess
import sys
import traceback


def report(checks, named):
    """Run checks in this process, by the names given, and print what each found."""
    found = {}
    for name, *arguments in checks:
        try:
            named[name](*arguments)
            found[str([name, *arguments])] = ""
        except Exception:
            found[str([name, *arguments])] = traceback.format_exc()
    print(json.dumps(found))


def elsewhere(script, checks, **environment):
    """Run a script's checks in a process of their own."""
    command = [sys.executable, script, json.dumps(checks)]
    where = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | environment
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
