"""Tables, figures and the page of a finished study. Only this folder and `claims` import pandas and altair."""
