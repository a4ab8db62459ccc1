"""What makes the site, the figures without records, and the packages of a release."""
