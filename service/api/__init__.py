"""The REST API: profiles as resources, what-ifs, plans compared and priced."""
