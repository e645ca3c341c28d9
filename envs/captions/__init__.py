"""Worlds of captions with what must be seen: scenes, words, signs, GenEval's categories. No simulator, no reward."""
