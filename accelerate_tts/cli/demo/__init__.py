"""The main job: a real English voice, offline, spoken plain and through the decorators."""
