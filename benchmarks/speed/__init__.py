"""Speed of whole UNets and of single layers against every other way to run them: `dev.py bench`."""
