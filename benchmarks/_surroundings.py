"""Other jobs, clocks, locales, names and rights."""

import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _trials import (
    FORK,
    Parts,
    calibrate,
    calibration,
    check,
    digests,
    forked,
    killed,
    silent,
    small_model,
    timed,
    tree,
    version_of,
)

from qjax.core import serialize
from qjax.core.locks import LOCK


def two_jobs(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """A folder that a process works in refuses a second one, and is free after a kill."""
    model, slow = small_model(folder / "float"), Parts(seconds=60)
    quick = Parts(seconds=0)
    found = {"second refused, with the first one's pid and host": 0, "taken over after a kill": 0}
    for i in range(count):
        out = folder / f"out-{i}"
        first = FORK.Process(target=silent, args=(lambda out=out: calibrate(model, out, slow),))
        first.start()
        while not (out / LOCK).exists():
            time.sleep(0.05)
            check(first.is_alive(), "the first job ended")
        time.sleep(0.1)

        def second(out: Path = out) -> str:
            try:
                calibrate(model, out, slow)
            except BlockingIOError as error:
                return str(error)
            return "not refused"

        said = forked(second)
        check(f"process {first.pid} on {platform.node()}" in said, said)
        found["second refused, with the first one's pid and host"] += 1
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        check((out / LOCK).exists(), "the file of the lock should have stayed")
        shutil.rmtree(out / "stage-0-parts-parts", ignore_errors=True)
        (out / "run.json").unlink(missing_ok=True)
        forked(lambda out=out: calibrate(model, out, quick))
        check(not (out / LOCK).exists(), "the lock was not removed")
        found["taken over after a kill"] += 1
    return found


def clocks(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Clocks that run backwards and dates of files in the past change nothing, after kills too."""
    model, stage = small_model(folder / "float"), Parts()
    seconds = forked(lambda: timed(lambda: calibrate(model, folder / "whole", stage)))

    def backwards(out: Path) -> None:
        now = time.time()
        ticks = iter(range(10**9))
        time.time = lambda: now - 86_400 * next(ticks)
        calibrate(model, out, stage)

    found = {"killed": 0, "runs with a clock that goes back a day at every look": 0}
    for i in range(count):
        out = folder / f"out-{i}"
        found["killed"] += killed(
            calibration(model, out, stage), (0.4 + rng.random() / 2) * seconds
        )
        for path in out.rglob("*"):
            os.utime(path, (0, 0))
        forked(lambda out=out: backwards(out))
        check(digests(out / "final") == digests(folder / "whole/final"), "the clock matters")
        found["runs with a clock that goes back a day at every look"] += 1
    return found


def places(folder: Path, rng: random.Random, _: int) -> dict[str, Any]:
    """Locales, names of folders, rights: the same bits, or an error and nothing written."""
    model = small_model(folder / "float")
    code = "import sys, qjax; q = qjax.load(sys.argv[1]); "
    code += "qjax.quantize(q, qjax.recipes.w4a8()).save(sys.argv[2])"
    known = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout
    found: dict[str, Any] = {"locales": [], "names": 0, "refused without the right": 0}
    names = ["plain", "mit Leerzeichen", "модель 模型 ı İ", "x" * 240, "a'b$c;d"]
    wanted = ["C", "C.utf8", "tr_TR.utf8", "de_DE.utf8"]
    good: dict[str, str] = {}
    for i, name in enumerate(wanted):
        if name not in ("C", "C.utf8") and name not in known.split():
            continue
        out = folder / names[i % len(names)] / names[(i + 1) % len(names)]
        env = os.environ | {"LC_ALL": name, "LANG": name, "PYTHONUTF8": "0"}
        env |= {"PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code, os.fsencode(model), os.fsencode(out)],
            env=env,
            capture_output=True,
            check=False,
        )
        check(done.returncode == 0, done.stderr.decode(errors="replace")[-500:])
        good = good or digests(out)
        check(digests(out) == good, f"{name} gives other bits")
        found["locales"].append(name)
    for name in names:
        forked(lambda name=name: serialize.save(folder / name / name, tree(1), {"version": 1}))
        forked(lambda name=name: serialize.save(folder / name / name, tree(2), {"version": 2}))
        check(forked(lambda name=name: version_of(folder / name / name))[0] == 2, name)
        found["names"] += 1

    def without_right(mode: int) -> str:
        place = folder / f"shut-{mode:o}"
        place.mkdir(mode=0o755)
        serialize.save(place / "save", tree(1), {"version": 1})
        os.chmod(place, mode)
        if os.getuid() == 0:
            for one in (folder, *folder.parents):
                if one.is_relative_to(tempfile.gettempdir()) and one != Path(tempfile.gettempdir()):
                    os.chmod(one, 0o755)
            os.setuid(65534)
        try:
            serialize.save(place / "save", tree(2), {"version": 2})
        except OSError as error:
            check(str(place) in str(error), f"not named: {error}")
            return "refused"
        return "written"

    check(forked(lambda: without_right(0o555)) == "refused", "a folder without right was written")
    check(forked(lambda: version_of(folder / "shut-555/save"))[0] == 1, "the old save is gone")
    found["refused without the right"] += 1

    def masked() -> str:
        os.umask(0o077)
        serialize.save(folder / "masked", tree(1), {"version": 1})
        return ",".join(f"{p.stat().st_mode & 0o777:o}" for p in (folder / "masked").iterdir())

    check(forked(masked) == "600,600", "umask 077 is not followed")
    found["umask 077"] = "followed"
    return found
