"""Pack the photographs of a folder into one fast-to-read file per split, or verify such files.

    python -m conadv_lab.data.pack DATA_DIR OUT_DIR [--side 400] [--workers N]
    python -m conadv_lab.data.pack PACKS --verify

See `conadv_lab.data.pack_file` for the format. An interrupted build continues where it stopped.
"""

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from conadv_lab.cli import parsed
from conadv_lab.data.pack_build import PackOptions, build_pack
from conadv_lab.data.pack_file import open_pack
from conadv_lab.mistakes import require
from conadv_lab.pipes import outlive_readers


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parsed(PackOptions, words, "conadv_lab.data.pack", __doc__)
        if options.verify:
            for path in _packs(options.data_dir):
                open_pack(path).verify()
                print(path)
            return 0
        for path in build_pack(options):
            print(path)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except (
        OSError,
        BrokenProcessPool,
    ) as failure:  # a full disk, or a worker that was killed or out of memory
        print(f"error: {str(failure).rstrip('.')}. Run the same command to continue", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to continue", file=sys.stderr)
        return 75
    return 0


def _packs(folder: Path) -> list[Path]:
    packs = sorted(folder.glob("*.pack"))
    require(bool(packs), "DATA_DIR", str(folder), "a folder that contains packs")
    return packs


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
