"""The page that a person shows a colleague: did the unlabelled scans help, for which classes, and can it be believed?"""
