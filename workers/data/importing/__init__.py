"""Import of a user's pictures as a dataset of a data root: folders of classes, tables of paths, Hugging Face datasets.

`sources.py` (folders, CSV, JSON lines) and `tables.py` (Arrow, Parquet) list samples. `dividing.py` assigns splits. `pictures.py`
checks every picture. `dataset.py` writes the complete dataset or nothing, and enters it into `suite.json`.
"""

from workers.data.importing.dataset import Imported, Order, import_data, order_of
from workers.data.importing.dividing import Shares
from workers.data.importing.found import Columns

__all__ = ["Columns", "Imported", "Order", "Shares", "import_data", "order_of"]
