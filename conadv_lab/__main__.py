"""``python -m conadv_lab`` lists the package's commands."""

COMMANDS = {
    "train": "train one recipe on this machine",
    "submit": "send runs to SLURM, or run them here; status and result tables",
    "sharpness": "curvature and sharpness of a model or a run",
    "staleness": "what stale attacks cost and gain: simulator, dynamics, theory",
    "data.pack": "pack a folder of photographs into one fast-to-read file",
    "demo": "compare the methods on digits, in minutes",
}


def main() -> None:
    """Print them."""
    print("usage: python -m conadv_lab.COMMAND; each lists its options with --help\n")
    for name, about in COMMANDS.items():
        print(f"  python -m conadv_lab.{name:9}  {about}")


if __name__ == "__main__":
    main()
