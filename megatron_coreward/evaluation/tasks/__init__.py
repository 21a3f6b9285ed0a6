"""Tasks for lm-evaluation-harness that it does not have, or not as the paper reports them: YAML files that name these
modules' functions. The folder is given to the harness as an include path."""
