"""The YAML of extensions, for Hydra to find: in this package because Hydra takes plugins from no other."""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Extensions(SearchPathPlugin):
    """After this package's folder, those of `conf_dirs`. A verb that is composed without groups has none."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        compose = sys.modules.get("llama_eqx.compose")
        if compose is None:  # an app of somebody else's
            return
        own, *others = map(str, compose.conf_dirs())
        if any(element.path.removeprefix("file://") == own for element in search_path.get_path()):
            for folder in others:
                search_path.append("llama_eqx", f"file://{folder}")
