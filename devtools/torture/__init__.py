"""`python dev.py torture`: damaged files, kills, cancels, faults, soak. One module a campaign.

A campaign is a module with `NAME` and `run(effort, say) -> list[Row]`; `main` knows them all.
"""
