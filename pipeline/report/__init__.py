"""What a finished study says: tables, figures and the page; the only place of the pipeline that imports pandas and altair."""
