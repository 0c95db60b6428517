"""Create manifests from folders: listing, layouts of data sets, examination, scan."""
