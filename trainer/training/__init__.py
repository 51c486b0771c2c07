"""The module that Lightning trains, and Lightning's trainer."""
