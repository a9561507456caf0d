"""The basic tasks."""
