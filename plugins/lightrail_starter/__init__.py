"""The embedded data, small models and basic tasks that a first run needs."""
