"""The same student under many methods, teachers and weightings, over many seeds, honestly.

    python -m kd.compare params.compare.yaml

Within a seed all cells share data, teacher, assistants, weights and the members' cached answers,
and differ in nothing but what their section says; equal epochs and images for all.  Work that is
done is not done again, so a comparison that was stopped goes on.  Needs neither DVC nor Prefect.
"""
