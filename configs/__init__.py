"""The recipes that ship with rlflow: one flat YAML file each."""

if __name__ != "rlflow.configs":
    raise ImportError("this folder installs as rlflow.configs: `pip install -e .` and import that")
