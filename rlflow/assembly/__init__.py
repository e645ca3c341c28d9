"""From a config to live objects, a file for each; the only room that knows both."""
