"""`python dev.py torture`: damaged files, kills, cancels, faults, soak. One module a campaign.

A campaign is a module with `NAME` and `run(effort, say)`, which gives a Row
for each kind of case as it is done; `main` knows them all.
"""
