"""Your own data: every file here is a command (`python -m training.prepare.NAME`); what they are made of lies in rooms.

`pack` -> `summarize` -> `detect` or `import_features` build the pyramid, `view` and `audit` look at it. `sources/` is
where pairs come from, `formats/` the region features that other programs stored, `steps/` how a step runs and what it
does to a sample.
"""
