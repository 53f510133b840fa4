"""The methods inside other people's trainers; each file needs only its own library."""
