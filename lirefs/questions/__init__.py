"""Labelled questions of two classes: prompts, chats and contrast pairs, and their split."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
