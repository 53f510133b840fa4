"""The methods inside other people's trainers: each file needs its own library alone."""
