"""What several commands share: cluster, configuration files, stop signals."""
