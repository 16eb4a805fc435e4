"""Small helpers shared by the rooms: files, progress, text and plots of reports."""
