"""``python -m benchmarks`` lists the benchmarks; ``python -m benchmarks NAME ...`` runs one."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Name and first line of the docstring of every module here that runs as a script."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not path.name.startswith("_") and '__name__ == "__main__"' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    found = benchmarks()
    if len(sys.argv) < 2:
        width = max(map(len, found))
        print("\n".join(f"  {name:{width}}  {line}" for name, line in found.items()))
        print("Run one: python -m benchmarks NAME --help")
        return
    name = sys.argv.pop(1)
    if name not in found:
        sys.exit(f"benchmark: got {name!r}, expected one of {', '.join(found)}.")
    sys.argv[0] = f"python -m benchmarks {name}"
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
