"""What is not collected here."""

collect_ignore = ["record_torchvision.py"]  # needs torchvision, which cannot be beside this project's torch
