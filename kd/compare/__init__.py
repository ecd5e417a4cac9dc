"""Compare methods, teachers and weightings fairly: the same student, over several seeds.

    python -m kd.compare params.compare.yaml

Within a seed all cells share data, teacher, assistants, weights and the members' cached outputs,
have equal budgets (for each generation), and differ only in what their section says.  Finished
units are not repeated, so a stopped comparison resumes.  Needs neither DVC nor Prefect.
"""
