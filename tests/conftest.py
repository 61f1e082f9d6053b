"""Property tests take the time they take: a deadline would fail them on a busy machine."""

from hypothesis import settings

settings.register_profile("antidote", deadline=None)
settings.load_profile("antidote")
