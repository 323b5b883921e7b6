"""A speech service in the shape of OpenAI's audio API. `python -m service` starts it; docs/SERVICE.md describes it."""
