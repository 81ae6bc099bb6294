"""Say why a build is as it is: causes, differences, blame, locks."""
