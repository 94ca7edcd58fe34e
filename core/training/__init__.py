"""The loop and what it stands on: schedule, preflight, run folder, terminal."""
