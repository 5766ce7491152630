"""Weights of other systems: conversion and export."""
