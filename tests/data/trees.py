"""Folder trees of small photographs, as ImageNet is laid out."""

from pathlib import Path

from tests.data.photos import encoded, photo


def write_tree(root: Path, train: int = 8, val: int = 2, classes: int = 3) -> Path:
    """``root/train`` and ``root/val`` with so many images a class, of mixed sizes, kinds and shapes."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = photo(
                    50 + 13 * i % 40, 90 - 11 * i % 50, seed=100 * label + i + (split == "val") * 50
                )
                kind = "PNG" if i == 3 else "JPEG"
                image = image.convert("L") if i == 1 else image.convert("CMYK") if i == 2 else image
                (folder / f"n{label:08d}_{i}.JPEG").write_bytes(encoded(image, kind))
    return root
