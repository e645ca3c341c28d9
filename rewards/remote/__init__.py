"""Rewards that are computed elsewhere: a server of ours and its client, judges behind an OpenAI-compatible API."""
