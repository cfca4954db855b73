"""MLflow as the receiver of rows: client, delivery, the store on this machine, its export, and the server behind `temporal-merge ui`."""
