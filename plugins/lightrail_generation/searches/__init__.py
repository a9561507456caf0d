"""Searches: schedules and statistics fitted for later runs."""
